"""Ghost's own commands: their options, and what they do.

Nothing here imports torch, which takes seconds: what a command does is imported when it runs.
"""
# ruff: noqa: D101  # the help is that of the options

from __future__ import annotations

from ghost_engines.cli.options import Plugins, Project, Query, Score, Store, Values, Verify


class VerifyCommand(Verify):
    __doc__ = Verify.__doc__

    def run(self) -> int:
        """Verify a model, and return the exit status."""
        from ghost_engines.cli.verify import verify

        return verify(self)


class ScoreCommand(Score):
    __doc__ = Score.__doc__

    def run(self) -> int:
        """Score a data set, and return the exit status."""
        from ghost_engines.cli.score import score

        return score(self)


class ProjectCommand(Project):
    __doc__ = Project.__doc__

    def run(self) -> int:
        """Project a data set, and return the exit status."""
        from ghost_engines.cli.project import project

        return project(self)


class QueryCommand(Query):
    __doc__ = Query.__doc__

    def run(self) -> int:
        """Search a store, and return the exit status."""
        from ghost_engines.cli.query import query

        return query(self)


class PluginsCommand(Plugins):
    __doc__ = Plugins.__doc__

    def run(self) -> int:
        """List plugins, and return the exit status."""
        from ghost_engines.cli.plugins import show

        return show()


class StoreCommand(Store):
    __doc__ = Store.__doc__

    def run(self) -> int:
        """Do what is asked of stores, and return the exit status."""
        from ghost_engines.cli.store import run

        return run(self.what)


class ValuesCommand(Values):
    __doc__ = Values.__doc__

    def run(self) -> int:
        """Add up a score log, and return the exit status."""
        from ghost_engines.cli.values import values

        return values(self)


COMMANDS = {
    "verify": VerifyCommand,
    "score": ScoreCommand,
    "project": ProjectCommand,
    "query": QueryCommand,
    "plugins": PluginsCommand,
    "store": StoreCommand,
    "values": ValuesCommand,
}
"""The commands by name."""
