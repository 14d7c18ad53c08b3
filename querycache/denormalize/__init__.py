"""Denormalized columns that stay right."""
