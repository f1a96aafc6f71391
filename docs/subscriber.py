"""An example subscriber: each alert once, those of severity High and above to standard output, a line each.

    pip install confluent-kafka
    python subscriber.py BROKER [TOPIC [GROUP]]

What matters in it, whatever yours does: `read_committed`, so that it sees what is committed and nothing twice; offsets
stored after an alert is dealt with, so that a crash repeats the last and skips none; and `metadata.uid`, by which what
it writes to can tell a repeated alert.
"""

import json
import signal
import sys

from confluent_kafka import Consumer


def handle(finding: dict) -> None:
    """What you do with it: open a ticket on Create, comment on Update, resolve on Close."""
    if finding["severity_id"] < 4:
        return
    info = finding["finding_info"]
    told = {1: "new ", 2: "more", 3: "over"}[finding["activity_id"]]
    print(f"{told}  {info['uid']}  {finding['severity']}: {info['title']} ({finding['count']} events)", flush=True)


def main() -> None:
    broker = sys.argv[1]
    topic = sys.argv[2] if len(sys.argv) > 2 else "alerts"
    group = sys.argv[3] if len(sys.argv) > 3 else "example-subscriber"
    consumer = Consumer(
        {
            "bootstrap.servers": broker,
            "group.id": group,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "enable.auto.offset.store": False,
        }
    )
    consumer.subscribe([topic])
    running = True

    def stop(*_: object) -> None:
        nonlocal running
        running = False

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while running:
        message = consumer.poll(0.5)
        if message is None or message.error():
            continue
        handle(json.loads(message.value()))
        consumer.store_offsets(message)
    consumer.close()


if __name__ == "__main__":
    main()
