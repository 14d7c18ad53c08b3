"""A second-level query cache for SQLAlchemy on dogpile.cache."""
