"""Data: files to records, records to rows, rows to examples, examples to batches; torch only in `batches` and `images`."""
