"""A folder for PYTHONPATH: what lies in it stands in for packages that an image may lack."""
