"""The tests here use the text and the model of those in test_cram.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.register_assert_rewrite("test_cram")

from test_cram import data, no_picture, stories, trained  # noqa: F401
