// A page that is opened from a folder may not start a Worker. This one runs the search in a hidden frame instead, so that
// it works without a server. It speaks to one script, the theme's search worker, and only where the address is file:.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      const inside = frame.contentWindow;
      window.addEventListener("message", (event) => {
        if (event.source !== inside) return;
        this.dispatchEvent(new MessageEvent("message", { data: event.data }));
        if (this.onmessage) this.onmessage(event);
      });
      inside.document.open();
      inside.document.write(
        "<script>" +
          'postMessage = function (data) { parent.dispatchEvent(new MessageEvent("message", { data: data, source: window })) };' +
          "importScripts = function () { return Array.from(arguments).reduce(function (before, url) {" +
          "  return before.then(function () { return new Promise(function (done) {" +
          '    var script = document.createElement("script"); script.src = url; script.onload = done;' +
          "    document.body.appendChild(script) }) }) }, Promise.resolve()) };" +
          "</script><body><script src=" + JSON.stringify(String(new URL(url, location.href))) + "></script></body>",
      );
      inside.document.close();
      this.send = (data) => inside.dispatchEvent(new MessageEvent("message", { data: data, source: window }));
      this.ready = new Promise((done) => frame.addEventListener("load", done));
    }

    postMessage(data) {
      this.ready.then(() => this.send(data));
    }

    terminate() {}
  };
}
