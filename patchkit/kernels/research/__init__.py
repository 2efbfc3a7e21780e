"""Ops that no patch runs yet: available to who builds one, and tested like the others."""
