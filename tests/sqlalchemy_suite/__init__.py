"""SQLAlchemy's own tests, run on rows that went through the cache.

The tests of the ORM are in SQLAlchemy's source distribution: some twelve thousand statements about how
objects are loaded, written by those who wrote the loader. ``python -m tests.sqlalchemy_suite`` runs them
twice, as they are and with :mod:`tests.sqlalchemy_suite.plugin`, and compares test by test. What passes
without the plugin has to pass with it; what does not is listed in ``known.toml`` with its reason.
"""
