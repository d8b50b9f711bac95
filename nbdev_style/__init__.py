"""Place of the literate lessons: notebooks and the modules they export. None is written yet."""
