"""Puts ``cases`` on the path of the tests in every folder here."""
