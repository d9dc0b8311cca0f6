"""How results are kept and shown: JSON of record, tables, pictures, docs/benchmarks.md."""
