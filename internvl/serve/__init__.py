"""Serves a model over HTTP, in the shape of OpenAI's API.

options       what a server is started with
http, app     requests in, responses out: keys, limits, errors, metrics
messages …    a chat request's fields, images and prompt
engines       threads that own a model each; chat_engine, dual_engine are what they run
server        the port, signals, and the end
"""

from internvl.serve.options import Limits, Options, parse_adapters

__all__ = ["Limits", "Options", "parse_adapters"]
