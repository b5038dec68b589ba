#!/usr/bin/python3
"""The window of WebKit that its driver starts: of any size, where MiniBrowser's has a least one.

Runs by Debian's own Python, which has the bindings.
"""

import gi

gi.require_version("Gtk", "3.0")
gi.require_version("WebKit2", "4.1")
from gi.repository import Gtk, WebKit2  # noqa: E402

WIDTH, HEIGHT = 1024, 768


def make_view(session: WebKit2.AutomationSession) -> WebKit2.WebView:
    """Make the page that the driver has."""
    view = WebKit2.WebView(web_context=context, is_controlled_by_automation=True)
    window = Gtk.Window(default_width=WIDTH, default_height=HEIGHT)
    window.connect("destroy", Gtk.main_quit)
    window.add(view)
    window.show_all()
    view.grab_focus()
    return view


def begin(_: WebKit2.WebContext, session: WebKit2.AutomationSession) -> None:
    """Take a session of the driver."""
    info = WebKit2.ApplicationInfo()
    info.set_name("messenger-tests")
    session.set_application_info(info)
    session.connect("create-web-view", make_view)


context = WebKit2.WebContext.new_ephemeral()
context.set_automation_allowed(True)
context.connect("automation-started", begin)
Gtk.main()
