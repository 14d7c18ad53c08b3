"""The history checker: readers, writers and faults at random, and a judge that knows what each read may have seen.

Some processes with some threads each work on a small universe of rows through the public interface only: cached reads
of many shapes, and writes on every path by which rows can change. Meanwhile processes are killed, and the cache server
is restarted, flushed, paused and starved (`faults.py`). Everybody writes a history to a file of its own
(`history.py`): when a commit was called and when it had returned, when a read began and ended, and what it saw. All
times are of the machine's monotonic clock, which its processes share.

Afterwards the judge (`judge.py`) puts the writes of each row in order and explains each read by them:

- Every value carries a *stamp* that no other write ever has. A stamp that was rolled back, or never written, is
  *dirty*.
- For each row that a read returned, and for each that it should have returned, the version seen must be one that
  could be in the database between the read's begin and its end. An older one is *stale*. The commit of a version is
  over when ``commit()`` has returned, or when it has been seen: what one reader has seen, no later one may miss, also
  where the writer was killed in its commit.
- The rows that one statement returned must have been in the database together; otherwise they are *torn*, as they are
  where they show a part of what one commit wrote.
- In a transaction that has written a row, it is the row as written, and nothing else.

    python -m tests.torture --minutes 10
    python -m tests.torture --mutant no-marks        # a protection is switched off: it must be found

A writer that is killed leaves a question: was it committed? The database itself answers it. Each transaction adds a
row to a log table, so it was committed if the row is there once all its locks are gone.
"""
