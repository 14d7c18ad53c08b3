"""The word count of a thread, over its comments, kept by each strategy: the SQL of every step, and the values.

python examples/forum_word_count.py
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, ForeignKey, Integer, String, create_engine, event, func, update
from sqlalchemy.orm import Session, declarative_base, mapped_column, relationship

from querycache.denormalize import expression, sum_of, verify

# The same measure in both languages, so that every strategy can keep it.
WORDS = expression(
    sql=lambda comment: (
        func.length(comment.message) - func.length(func.replace(comment.message, " ", "")) + 1
    ),
    python=lambda comment: len(comment.message.split(" ")),
    columns=("message",),
)


def forum(strategy: str) -> tuple[Any, Any, Any]:
    """A base, and Thread and Comment whose word count is kept by `strategy`."""
    Base: Any = declarative_base()

    class Thread(Base):
        __tablename__ = "thread"
        id = mapped_column(Integer, primary_key=True)
        comments = relationship("Comment", back_populates="thread")
        word_count = sum_of("comments", WORDS, strategy=strategy, type_=Integer)

    class Comment(Base):
        __tablename__ = "comment"
        id = mapped_column(Integer, primary_key=True)
        message = mapped_column(String(200), nullable=False)
        thread_id = mapped_column(ForeignKey("thread.id"), index=True)
        thread = relationship(Thread, back_populates="comments")

    return Base, Thread, Comment


def listen(engine: Engine) -> list[str]:
    """The statements that the engine runs, in order."""
    seen: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def record(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        seen.append(f"{' '.join(statement.split())}  {parameters!r}")

    return seen


def show(strategy: str) -> None:
    Base, Thread, Comment = forum(strategy)
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    print(f'\n══ strategy="{strategy}" ' + "═" * (60 - len(strategy)))
    with Session(engine, expire_on_commit=False) as session:
        one, two = Thread(id=1), Thread(id=2)
        session.add_all([one, two])
        session.commit()
        seen = listen(engine)

        def step(what: str) -> None:
            before = one.word_count, two.word_count
            session.flush()
            print(f"\n{what}: before the flush {before}")
            for statement in seen:
                print(f"    {statement[:190]}")
            seen.clear()
            print(f"  → words in thread 1 and 2: {one.word_count}, {two.word_count}")
            seen.clear()

        one.comments.append(Comment(message="the quick brown fox"))
        one.comments.append(Comment(message="jumps over"))
        step("two comments are written")

        one.comments[0].message = "the fox"
        step("one is shortened")

        one.comments[0].thread = two
        step("and moved to the other thread")

        session.execute(update(Comment).values(message=Comment.message + " again"))
        step("a bulk update adds a word to each")

        session.delete(two.comments[0])
        step("one is deleted")

        session.commit()
        assert verify(engine, Base).right
        engine.dispose()


def main() -> None:
    for strategy in ("sql", "recount", "flush", "memory", "trigger"):
        show(strategy)


if __name__ == "__main__":
    main()
