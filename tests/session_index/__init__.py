"""Tests of the session index; SQLite in memory, no servers."""
