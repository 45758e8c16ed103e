"""Tests of the tests and of the code: they need the repository, so no wheel holds them."""
