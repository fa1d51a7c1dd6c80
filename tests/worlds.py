"""Start a function on several forked gloo ranks and wait for it."""

from iwopd_megatron.parallel import start_local


def run_world(world, function, *args):
    """Run `function(*args)` on every rank; a failing rank fails the caller."""
    context = start_local(world, function, args)
    while not context.join():
        pass
