"""Options of pytest for this project."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that need minutes and gigabytes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs minutes and gigabytes; run with --slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="needs minutes and gigabytes; run with --slow"))
