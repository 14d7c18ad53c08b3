"""Tests of `querycache.denormalize`."""
