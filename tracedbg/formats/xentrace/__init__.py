"""Binary traces of Xen's xentrace."""
