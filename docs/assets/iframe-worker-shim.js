/* The search runs in a worker, which browsers refuse to start from a file on the disk. Where a page is
   opened from the disk, this runs the same script in a hidden frame instead; it loads nothing else. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = inside.document.createElement("script")
      script.src = address
      script.onload = () => {
        this.ready = true
        this.waiting.splice(0).forEach(data => this.postMessage(data))
      }
      inside.document.body.append(script)
    }

    postMessage(data) {
      const { frame, ready, waiting } = this
      if (ready) frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
      else waiting.push(data)
    }

    terminate() {
      this.frame.remove()
    }
  }
}
