"""Other people's file formats, read and written without their libraries."""
