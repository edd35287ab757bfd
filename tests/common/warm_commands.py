"""Imported for its effect, by processes from which others are forked: for all of them tyro has read the settings' sources."""

import quick_command_lines  # noqa: F401

from glf_fast.training.arguments import parse_train

parse_train(["--preset", "smoke"])
