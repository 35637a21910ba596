"""Write what ``launcher.c`` includes: the files of a directory, compressed, and their names and sizes."""

import hashlib
import sys
import zlib
from pathlib import Path

folder, output = map(Path, sys.argv[1:])
names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
contents = [(folder / name).read_bytes() for name in names]
rows = [f'{{"{name}", {len(content)}}},' for name, content in zip(names, contents, strict=True)]
joined = b"".join(contents)
build = hashlib.sha256("\n".join(rows).encode() + joined).hexdigest()[:16]
(output / "payload").write_bytes(zlib.compress(joined, 9))
(output / "payload.h").write_text(
    "\n".join(
        [
            "static const struct file files[] = {",
            *rows,
            "};",
            f'#define BUILD "{build}"',
            f"#define UNPACKED_SIZE {len(joined)}",
            "",
        ]
    )
)
