"""Imported for its effect, by processes from which others are forked: tyro has read the sources of the settings for all of them."""

import quick_command_lines  # noqa: F401

from glf_fast.training.arguments import parse_train

parse_train(["--preset", "smoke"])
