"""Addresses: how they are read, shown and written down."""

import pytest
from emoloop.domain import UserError
from emoloop.tools.urls import base_urls, is_local, public, redact


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.8.8.8/v1", True),
        ("http://localhost/v1", True),
        ("http://gpu.localhost/v1", True),
        ("https://[::1]:8000/v1", True),
        ("http://0.0.0.0:8000/v1", True),
        ("http://10.0.0.1/v1", False),
        ("http://localhost.example.com/v1", False),
        ("https://example.com/v1", False),
    ],
)
def test_which_addresses_are_this_machine(url, local):
    assert is_local(url) is local


def test_addresses_are_read():
    assert base_urls(" a:8000/v1/ , https://b/v1,", "x") == ["http://a:8000/v1", "https://b/v1"]
    with pytest.raises(UserError, match=r"lvlm\.base_url 'http://\*\*\*@:1'"):
        base_urls("http://ann:s3cret@:1", "lvlm.base_url")


def test_what_is_written_down_holds_no_secret():
    settings = {"lvlm": {"api_key": "k", "base_url": "http://ann:s3cret@a/v1", "timeout": 2.0}, "home": None}
    assert public(settings) == {"lvlm": {"base_url": "http://***@a/v1", "timeout": 2.0}, "home": None}
    assert public(public(settings)) == public(settings)
    assert redact("http://a/v1") == "http://a/v1"
