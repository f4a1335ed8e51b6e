"""Data: files to records, records to rows, rows to examples, examples to batches; torch only in `batches`."""

from deltaloom.data.encode import Example
from deltaloom.data.facts import data_facts, overlap
from deltaloom.data.labels import LabelMap
from deltaloom.data.read import Data, Rows, read_data, read_rows
from deltaloom.data.rows import Row
from deltaloom.data.settings import DataSettings

__all__ = ["Data", "DataSettings", "Example", "LabelMap", "Row", "Rows", "data_facts", "overlap", "read_data", "read_rows"]
