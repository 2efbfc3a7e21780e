"""Ops that no patch runs yet: tested like the others, and at hand for who builds one."""
