"""The HTTP service: an API to start, watch and steer runs, and the pages that show them.

Everything that is shown is made from committed events. Pages and the static bundle are the same templates.
"""
