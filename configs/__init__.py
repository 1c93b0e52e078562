"""Ready-to-run configurations; read them with ``importlib.resources.files("hansa.configs")``."""
