"""Files that clients upload: ``/v1/files``."""
