"""The searches of the row ``search`` on LanceDB, in .venv-lancedb, which has nothing of ours.

    .venv-lancedb/bin/python tests/bench/lance_search.py FOLDER

Its texts are our terms with blanks between, so that it ranks the same words; vectors are searched exactly, as ours are; a
hybrid search is its own, by reciprocal ranks. What it reads and prints is described in ``searching``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import psutil
import pyarrow as pa
from lancedb.index import FTS, Bitmap
from lancedb.rerankers import RRFReranker

Rows = list[dict[str, Any]]


def main(folder: Path) -> None:
    texts = [json.loads(line) for line in (folder / "texts.jsonl").open()]
    vectors = np.load(folder / "vectors.npy")
    queries = json.loads((folder / "queries.json").read_text())
    asked = np.load(folder / "queries.npy")
    batch = queries["batch"]

    table = lancedb.connect(folder / "lance").create_table(
        "s",
        schema=pa.schema(
            [
                ("id", pa.string()), ("tenth", pa.int64()), ("text", pa.string()), ("terms", pa.string()),
                ("vector", pa.list_(pa.float32(), vectors.shape[1])),
            ]
        ),
    )  # fmt: skip
    began = time.perf_counter()
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors[start : start + batch].ravel()), vectors.shape[1])
        columns = {name: [text[name] for text in part] for name in ("id", "tenth", "text", "terms")}
        table.add(pa.table({**columns, "vector": rows}, schema=table.schema))
    load_s = time.perf_counter() - began
    table.create_index(
        "terms",
        config=FTS(
            base_tokenizer="whitespace", stem=False, remove_stop_words=False, ascii_folding=False, lower_case=False,
            max_token_length=200,
        ),
    )  # fmt: skip
    table.create_index("tenth", config=Bitmap())
    table.optimize()
    by_text(table, queries["terms"][0])
    ready_s = time.perf_counter() - began

    del table
    began = time.perf_counter()
    table = lancedb.connect(folder / "lance").open_table("s")
    hybrid(table, queries["terms"][0], asked[0])
    reopen_s = time.perf_counter() - began

    tenth = f"tenth = {queries['tenth']}"
    searches: dict[str, Callable[[int], Rows]] = {
        "hybrid": lambda n: hybrid(table, queries["terms"][n], asked[n]),
        "text": lambda n: by_text(table, queries["terms"][n]),
        "vector": lambda n: (
            table.search(asked[n], vector_column_name="vector").distance_type("cosine").limit(10).to_list()
        ),
        "filtered": lambda n: hybrid(table, queries["terms"][n], asked[n], tenth),
    }
    taken = {name: times(search, len(asked)) for name, search in searches.items()}
    measured = {
        "load_s": load_s, "ready_s": ready_s, "reopen_s": reopen_s, **taken, "floor": [0.0, 0.0],
        "rss_mib": psutil.Process().memory_info().rss / 2**20,
        "disk_mib": sum(path.stat().st_size for path in (folder / "lance").rglob("*") if path.is_file()) / 2**20,
    }  # fmt: skip
    print(json.dumps(measured))


def by_text(table: Any, terms: str) -> Rows:
    found: Rows = table.search(terms, query_type="fts", fts_columns="terms").limit(10).to_list()
    return found


def hybrid(table: Any, terms: str, vector: Any, condition: str = "") -> Rows:
    query = (
        table.search(query_type="hybrid", vector_column_name="vector", fts_columns="terms").vector(vector).text(terms)
    )
    query = query.distance_type("cosine").limit(50).rerank(RRFReranker())
    if condition:
        query = query.where(condition, prefilter=True)
    found: Rows = query.to_list()[:10]
    return found


def times(search: Callable[[int], Rows], count: int) -> list[float]:
    """p50 and p95 in ms, after some that warm up."""
    for n in range(20):
        assert search(n)
    taken = []
    for n in range(count):
        began = time.perf_counter()
        search(n)
        taken.append((time.perf_counter() - began) * 1000)
    return [statistics.median(taken), statistics.quantiles(taken, n=20)[-1]]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
