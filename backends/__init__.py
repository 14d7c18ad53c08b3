"""The dogpile backends of querycache, one file a store."""
