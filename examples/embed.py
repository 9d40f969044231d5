"""An app with a device inside: a note pad that suggests the next word, and learns with all its other users.

    python examples/embed.py FOLDER --server URL --population NAME --token TOKEN      the first time
    python examples/embed.py FOLDER

Every line that you type is a note. It stays in FOLDER; what leaves is what `homespun.device` sends, and
only while this machine is idle, charging and on a free network, and the app runs.
"""

import argparse
import sys

from homespun.device import Device
from homespun.errors import HomespunError, NotFound


def open_device(arguments: argparse.Namespace) -> Device:
    """The device in the app's folder; the first time it introduces itself to the server."""
    if arguments.server is None:
        return Device(arguments.folder)
    return Device.enroll(
        arguments.folder,
        server=arguments.server,
        population=arguments.population,
        token=arguments.token,
    )


def suggestions(device: Device, note: str) -> str:
    """What may come next, from the model on this machine."""
    try:
        return ", ".join(suggestion.word for suggestion in device.predict(note))
    except NotFound:
        return "no model yet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    for option in ("--server", "--population", "--token"):
        parser.add_argument(option)
    with open_device(parser.parse_args()) as device:
        device.start()
        print("Write a note; end with an empty line.", flush=True)
        for line in sys.stdin:
            note = line.strip()
            if not note:
                break
            device.store.add({"text": note})
            print(f"   next: {suggestions(device, note)}", flush=True)
        for sentence in device.why().text:
            print(f"The device: {sentence}.")


if __name__ == "__main__":
    try:
        main()
    except HomespunError as error:
        sys.exit(f"{error}")
