"""Two tenants on one server, both under load: what can one learn of the other?"""
