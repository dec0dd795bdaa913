"""Result folders as `internvl evaluate` leaves them, with rows of one's choice."""

import json
from pathlib import Path

from internvl.report import results


def result_folder(
    folder: Path, name: str, rows: list[dict], metrics: dict[str, float], **settings
) -> Path:
    """Writes an evaluation into a result folder."""
    (folder / "result").mkdir(parents=True, exist_ok=True)
    file = folder / "result.json"
    earlier = json.loads(file.read_text()) if file.is_file() else {}
    values = {f"{name}/{metric}": value for metric, value in metrics.items()}
    file.write_text(json.dumps(earlier | values))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    file = folder / "result" / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(lines)
    results.write_settings(folder, f"org/{folder.name}", {"torch": "2"}, {name: settings})
    return folder
