"""Flows behind other libraries' interfaces: one file a library. Nothing here is imported until it is asked for."""
