"""`python -m cmh_milvus`."""

from cmh_milvus.cli import main

main()
