"""The embedded world: a renderer, an affect law, and small models trained from scratch on both.

It exists so that everything in emoloop can be tried, tested and measured on two cores without a model hub. It
is an ordinary model folder plus a preset for the rest of the package; nothing else knows its name. The law is
a law of this world, not psychology.
"""
