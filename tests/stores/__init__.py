"""One suite per contract, inherited by the test class of each backend, which only says how to make it."""
