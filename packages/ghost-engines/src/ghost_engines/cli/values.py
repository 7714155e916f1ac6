"""What `ghost values` does."""

from __future__ import annotations

from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.folder_options import Values
from ghost_engines.cli.outputs import check_outputs, print_extremes, write_outputs
from ghost_engines.cli.tables import plain, print_table, while_read
from ghost_engines.log import open_log
from ghost_engines.store import MANIFEST, DamagedStoreError, MissingLogError


def run(options: Values) -> int:
    """Add up a log, write and print what is in it, and return the exit status."""
    check_outputs(options.top, options.out, options.plot)
    try:
        log = open_log(options.path)
        if options.verify:
            log.verify()
    except MissingLogError as error:
        if not (options.path / MANIFEST).is_file():
            raise
        raise CommandError(
            f"{options.path} is a store of gradients, and no score log",
            remedy="describe it with `ghost store info`",
        ) from error
    except DamagedStoreError as error:
        if not options.verify:
            raise
        for problem in str(error).splitlines():
            print(plain(f"damaged: {problem}"))
        return 1
    table = log.totals()
    write_outputs(table, table.plot, options.out, options.plot)
    summary = [
        ("path", str(log.path)),
        ("directions", ", ".join(log.directions) or "-"),
        ("steps", str(len(log))),
        ("first step", str(log.first or "-")),
        ("last step", str(log.last or "-")),
        ("samples", str(len(table))),
        ("credits", str(table.counts[:, 0].sum())),
        ("size on disk", f"{log.size_on_disk} bytes"),
        *([("verified", "every shard fits its hash")] if options.verify else []),
    ]
    beside = {"times seen": table.counts[:, 0], "last step": table.counts[:, 2]}
    with while_read():
        print_table(("property", "value"), summary)
        print_extremes(
            table.ids, table.values, log.directions, beside,
            what="value", top=options.top, signed=True,
        )  # fmt: skip
    return 0
