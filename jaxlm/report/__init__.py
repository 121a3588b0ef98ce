"""Builds the pages of `jaxlm report`: all studies, and all papers that the code implements."""
