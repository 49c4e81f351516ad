"""Candidates in other tools' formats: containers.py reads files, formats.py their rows, reading.py both together."""
