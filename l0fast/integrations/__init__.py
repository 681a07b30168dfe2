"""Callbacks for the trainers of other libraries, each imported only when it is asked for."""
