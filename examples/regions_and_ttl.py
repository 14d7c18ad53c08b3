"""Several regions from a configuration file, each with a time to live of its own.

An operator decides where answers are kept and for how long; the code only names regions.
"""

import tempfile
from pathlib import Path

from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from querycache import QueryCache, UnknownRegion

CONFIGURATION = """
[querycache]
namespace = "shop"
ttl = 3600                          # seconds; for regions and statements that do not say

[querycache.regions.default]
url = "memory://?max_bytes=64mb"    # in production: redis://cache-host:6379/0

[querycache.regions.prices]
url = "memory://?max_bytes=8mb"
ttl = 30

[querycache.regions.catalogue]
url = "memory://?max_bytes=256mb"
ttl = 86400
"""


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "products"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    price: Mapped[int]


with tempfile.TemporaryDirectory() as directory:
    file = Path(directory) / "querycache.toml"
    file.write_text(CONFIGURATION)
    cache = QueryCache.from_config(file)

engine = create_engine("sqlite://")
Base.metadata.create_all(engine)
Session = sessionmaker(engine)
cache.attach(Session)
with Session.begin() as session:
    session.add_all([Product(name="cup", price=7), Product(name="plate", price=9)])

names = select(Product.name).execution_options(cache_key="names", cache_region="catalogue")
prices = select(Product.price).execution_options(cache_key="prices", cache_region="prices")
# a statement's own time to live comes before that of its region
counts = select(Product.id).execution_options(cache_key="ids", cache_ttl=5, cache_tags=["products"])
statements = (names, prices, counts)


def ask() -> dict[str, str]:
    """The first outcome in each region."""
    with cache.recording() as events, Session() as session:
        for statement in statements:
            session.execute(statement).all()
    return {each.region: each.outcome for each in events if each.outcome != "fill"}


print("first time:                ", ask())
answer = ask()
print("again:                     ", answer)
assert answer == {"catalogue": "hit", "prices": "hit", "default": "hit"}

# One region can be emptied without the others, and so can all that carries a tag.
cache.invalidate(region="prices")
answer = ask()
print("invalidate(region='prices')", answer)
assert answer == {"catalogue": "hit", "prices": "stale", "default": "hit"}
cache.invalidate(tags=["products"])
answer = ask()
print("invalidate(tags=[...]):    ", answer)
assert answer == {"catalogue": "hit", "prices": "hit", "default": "stale"}

try:
    with Session() as session:
        session.execute(names.execution_options(cache_region="catalog")).all()
    raise AssertionError("an unknown region must be an error")
except UnknownRegion as error:
    print("a misspelt region:         ", error)
