"""Our rewards inside other trainers, through the reward server.

Nothing here needs more than the standard library, so that `pip install --no-deps` is enough in an environment
whose versions another trainer has fixed. The server (`rlme serve`) runs in an environment of its own.
"""
