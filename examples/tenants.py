"""Tenants: a handler that adds a criteria to every select, registered before the cache, and after it.

The cache answers a statement only when every other handler has had its say, wherever it was registered. So
what it looks up is the statement with the tenant in it, and no tenant is ever given an answer of another.
"""

from contextvars import ContextVar

from sqlalchemy import ForeignKey, create_engine, event, select
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
    with_loader_criteria,
)

from querycache import QueryCache

current_tenant: ContextVar[str] = ContextVar("current_tenant")


class Base(DeclarativeBase):
    pass


class OfTenant:
    tenant: Mapped[str] = mapped_column()


class Project(OfTenant, Base):
    __tablename__ = "projects"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    tasks: Mapped[list["Task"]] = relationship(order_by="Task.id")


class Task(OfTenant, Base):
    __tablename__ = "tasks"

    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey(Project.id))
    name: Mapped[str]


def only_the_current_tenant(state: ORMExecuteState) -> None:
    """As in SQLAlchemy's documentation; the criteria follow to eager and lazy loads by themselves."""
    if state.is_select and not state.is_column_load and not state.is_relationship_load:
        tenant = current_tenant.get()
        state.statement = state.statement.options(
            with_loader_criteria(OfTenant, lambda cls: cls.tenant == tenant, include_aliases=True)
        )


engine = create_engine("sqlite://")
Base.metadata.create_all(engine)
with sessionmaker(engine).begin() as session:
    for tenant in ("red", "blue"):
        project = Project(name=f"project of {tenant}", tenant=tenant)
        # a task of the other tenant in it: what must not show
        project.tasks = [Task(name=f"task of {each}", tenant=each) for each in ("red", "blue")]
        session.add(project)

statement = select(Project).options(selectinload(Project.tasks)).execution_options(cache_key="all projects")

for order in ("handler before the cache", "handler after the cache"):
    Session = sessionmaker(engine)
    cache = QueryCache("memory://")
    if order == "handler before the cache":
        event.listen(Session, "do_orm_execute", only_the_current_tenant)
    cache.attach(Session)
    if order == "handler after the cache":
        event.listen(Session, "do_orm_execute", only_the_current_tenant)

    print(order)
    for expected in ("miss", "hit"):
        for tenant in ("red", "blue"):
            current_tenant.set(tenant)
            with cache.recording() as events, Session() as session:
                projects = session.scalars(statement).all()
                seen = [(project.name, [task.name for task in project.tasks]) for project in projects]
            print(f"  {tenant:5} {events[0].outcome:5} {seen}")
            assert events[0].outcome == expected
            assert seen == [(f"project of {tenant}", [f"task of {tenant}"])]

# cache_exact=True (and CachingQuery.with_cache_key) looks up by the key alone, so there the tenant must be part
# of the key: that is what scope is for. It does no harm elsewhere.
Session = sessionmaker(engine)
cache = QueryCache("memory://", scope=lambda session: current_tenant.get())
cache.attach(Session)
event.listen(Session, "do_orm_execute", only_the_current_tenant)
exact = select(Project.name).execution_options(cache_key="names", cache_exact=True)
print("by the key alone, with a scope")
for tenant in ("red", "blue", "red", "blue"):
    current_tenant.set(tenant)
    with Session() as session:
        names = session.scalars(exact).all()
    print(f"  {tenant:5} {names}")
    assert names == [f"project of {tenant}"]
