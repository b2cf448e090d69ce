"""A run answers over HTTP: the app knows no Ray, its deployment is Ray Serve's."""
