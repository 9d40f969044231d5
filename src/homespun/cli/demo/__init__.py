"""`homespun demo`: the whole story once, small but real, on one machine."""

from __future__ import annotations

from pathlib import Path

import typer

from homespun.cli.output import out

DEFAULT_DIRECTORY = Path(".homespun/demo")
INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add `demo` to the command line."""

    @app.command()
    def demo(
        directory: Path = typer.Option(
            DEFAULT_DIRECTORY, "--dir", help="Where the server and the devices keep their files."
        ),
        text: Path | None = typer.Option(
            None,
            help="Your own text: a folder (file = user), Parquet or JSONL with user and text, or a "
            "chat export. Default: the documentation strings of this Python.",
        ),
        public_text: Path | None = typer.Option(
            None, help="Public text for the vocabulary. Default: Python's language reference."
        ),
        devices: int = typer.Option(40, min=40, max=200, help="Device processes."),
        rounds: int = typer.Option(20, min=1, max=1000, help="Training rounds."),
        seed: int = typer.Option(0, help="Of the devices, the draws and the training."),
        exact: bool = typer.Option(
            False,
            help="Draw from all devices, with nobody scripted away and no over-selection: two runs "
            "with one seed then end at the same checkpoint, bit for bit.",
        ),
        fresh: bool = typer.Option(False, help="Start clean even if an earlier run can resume."),
    ) -> None:
        """Train, test and ship a next-word model over real device processes.

        Running it again resumes a run that was interrupted; after a complete one it starts clean.
        """
        from homespun.cli.demo.stage import Settings
        from homespun.cli.demo.story import play  # the demo's imports are its own

        settings = Settings(
            text=None if text is None else str(text.resolve()),
            public_text=None if public_text is None else str(public_text.resolve()),
            devices=devices,
            rounds=rounds,
            seed=seed,
            exact=exact,
        )
        try:
            raise typer.Exit(play(settings, directory, fresh=fresh))
        except KeyboardInterrupt:
            out.print("interrupted; nothing is left running. The same command resumes.")
            raise typer.Exit(INTERRUPTED) from None
