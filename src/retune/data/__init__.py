"""From landed files to the three splits: ingest, schema, preprocess, duplicates, profile. Pure DataFrame -> DataFrame but for reading."""
