import lorasb_export  # noqa: F401  before any module imports transformers
