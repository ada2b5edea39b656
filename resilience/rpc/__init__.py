"""Generated protocol code. Only coordinator/service, guard/client, launch and cli import it."""
