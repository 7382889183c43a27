"""What a process of a training under attack has imported before it is forked."""

from tests.cli.fork_server import preload

preload()
